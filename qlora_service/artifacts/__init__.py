"""Published files: the store, the manifest, the model card."""
