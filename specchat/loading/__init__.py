"""From names of models to an engine that is ready: find, plan, prepare, load. No terminal is involved."""
