"""How weights are quantised, packed and multiplied."""
