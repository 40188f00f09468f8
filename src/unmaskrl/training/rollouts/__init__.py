"""Where the rows of a step come from: problems, anchors, decoding, rewards, the learned sampler."""
