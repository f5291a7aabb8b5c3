"""Who the patients are: images and questions from files to `Sample`. Knows no model."""
