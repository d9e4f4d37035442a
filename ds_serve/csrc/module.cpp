// The Python module that torch's loader imports. The ops themselves are registered with
// TORCH_LIBRARY_FRAGMENT(ds_serve, ...) in the other files and called as torch.ops.ds_serve.*.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "ds_serve's C++ ops (see torch.ops.ds_serve)"; }
