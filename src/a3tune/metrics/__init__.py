"""How good answers and attention are, and how sure one can be. Knows texts and arrays, no models."""
