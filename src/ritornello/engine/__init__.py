"""Running a trained model: sampling, decoding at any depth."""
