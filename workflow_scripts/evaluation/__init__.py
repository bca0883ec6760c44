"""How good a distilled set is: classifiers trained on it, by the published protocols, and statistics over repeats."""
