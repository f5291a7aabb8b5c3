"""Decoding methods written down once more, slowly, from published code: no cache, no batch, no capture of ours."""
