"""The frozen autoencoder: loading, encoding and decoding. Nothing here is imported until one is asked for."""
