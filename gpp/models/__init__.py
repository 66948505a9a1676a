"""Plain torch modules to train; nothing in them knows of pipelines."""
