"""Memory for activations lies where processors copy fast between it and the pages of a shard."""

from collections.abc import Callable

import pytest
import torch

from shared.store.buffers import PAGE_BYTES, empty_to_read, empty_to_write
from shared.store.format.checksum import CRC_BYTES

CHUNK_BYTES = 8 * PAGE_BYTES
SLOW = range(1, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("make", [empty_to_read, empty_to_write])
def test_a_tensor_of_its_own(make: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    tensor = make((3, 5, 8), dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 5, 8), dtype, True)
    ones = torch.ones(3, 5, 8, dtype=dtype)
    assert tensor.copy_(ones).equal(ones)
    assert tensor.data_ptr() % tensor.element_size() == 0


def test_no_destination_is_a_few_bytes_above_its_source_within_a_page() -> None:
    """For the first thousand chunks of a shard, each 4 bytes further into a page than the one before."""
    for _ in range(5):
        read = empty_to_read((1000, CHUNK_BYTES), torch.uint8)
        written = empty_to_write((1000, CHUNK_BYTES), torch.uint8)
        for number in range(1000):
            in_file = number * (CHUNK_BYTES + CRC_BYTES)
            assert (read[number].data_ptr() - in_file) % PAGE_BYTES not in SLOW
            assert (in_file - written[number].data_ptr()) % PAGE_BYTES not in SLOW
