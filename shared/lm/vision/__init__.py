"""Vision-language models: which region of an image each of its tokens stands for, and what a forward is given."""
