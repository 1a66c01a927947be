"""The operator layer: one file per operator with its schema, fake kernel and autograd, and the registry of backends."""
