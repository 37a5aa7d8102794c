"""Fine-tune a language model on your text and keep an attribute of what it says under control."""

__version__ = "0.1.0"
