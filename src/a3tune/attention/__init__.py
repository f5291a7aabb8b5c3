"""What the model looks at: capture, visual heads, alignment loss. Knows tensors, no images."""
