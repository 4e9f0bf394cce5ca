"""Ciphers and key management of encrypted images."""
