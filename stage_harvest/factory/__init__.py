"""Harvests of any module: a function of the user's makes the model and its batches (``model.factory``).

``made`` calls it, ``survey`` goes through the batches once and lays out their rows as contexts, ``rows`` runs the model
on the batches of a shard, ``run`` is the whole of it. The function is named by the user alone: no store, run folder or
SAE folder is ever asked for code to run.
"""
