"""How much of the input each block still carries: estimators of mutual information, and their profile over blocks."""
