"""What a latent is said to do, and how well that holds: rules, and language models' explanations, each with scores."""
