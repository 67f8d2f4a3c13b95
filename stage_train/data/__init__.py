"""What a run reads: stores, statistics, the stream of batches."""
