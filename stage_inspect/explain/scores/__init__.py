"""How well an explanation holds, a file for each way to ask; `measure` has the formulas that they share."""
