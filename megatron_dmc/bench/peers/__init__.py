"""Other engines, each in an environment of its own, side by side with this one on the same model and machine."""
