"""A learner's side: streams of batches, the ring, tensors, episodes read back."""
