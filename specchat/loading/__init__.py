"""Find, plan, prepare and load models by name, without a terminal."""
