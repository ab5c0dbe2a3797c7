"""The large networks: decoders in the shape of Llama, and GPT-2."""
