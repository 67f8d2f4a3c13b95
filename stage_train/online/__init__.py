"""Training on the activations of a model that runs in this process, without a store.

``rows`` runs the model, ``buffer`` shuffles what it gives, ``stream`` hands that out as batches, ``fit`` puts the same
runs on it that ``stage_train.job`` puts on a store.
"""
