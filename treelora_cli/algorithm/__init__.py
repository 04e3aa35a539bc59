"""TreeLoRA itself: signatures, the tree, its search and the pull. Pure: no files, no model."""
