"""The learner's side: single batches, streams of batches, the ring in shared memory, tensors, stored episodes read back."""
