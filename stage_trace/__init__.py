"""Attribution graphs: which latents of which tokens made a model say what it says, in rows that add up."""
