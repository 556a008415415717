"""From scores of parameters to masks: patterns, exact top-k, Fisher scores."""
