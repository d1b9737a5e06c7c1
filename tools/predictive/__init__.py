"""The paper's Figure 2 at a small size: captions or words predicted, and contrastive."""
