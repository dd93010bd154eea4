"""Published files: artifact store, manifest, model card."""
