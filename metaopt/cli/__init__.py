"""The commands, and the bridge from their arguments to the library: the only place that knows Hydra."""
