"""The pages that show what each latent does: served on this machine, as a folder for a web host, or as one file."""
