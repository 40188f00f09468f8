"""A checkpoint becomes a Denoiser and a tokenizer, and goes back to disk."""
