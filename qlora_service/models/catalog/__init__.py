"""Import and storage of base models: ordinary Hugging Face directories, checked by content."""
