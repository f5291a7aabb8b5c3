"""Pages and cards for people. Knows numbers, pictures and words; loads no model."""
