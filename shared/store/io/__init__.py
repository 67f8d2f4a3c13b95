"""Where objects of a store lie: a local folder or any URL; whole objects in, whole objects or ranges out."""
