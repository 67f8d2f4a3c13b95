"""What latents are said to do, and how well that holds: by rules or by a language model, each with scores."""
