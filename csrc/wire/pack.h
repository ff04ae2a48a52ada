// Packing of strided pieces on a GPU: copies that need no SM where the shape allows, else kernels.
#pragma once
#include <cuda_runtime_api.h>

#include "wire/view.h"

namespace foldcp {

// In stream order; `message` is device memory of at least part.offset + part.bytes() bytes.
void pack(const Part& part, char* message, cudaStream_t stream);
void unpack(const Part& part, const char* message, cudaStream_t stream);

}  // namespace foldcp
