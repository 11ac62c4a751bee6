// The torch side of ffreduce: a c10d::Backend over the C ABI of the Rust core (ffreduce.h).
//
// All the thinking is done in the core: matching, progress, time limits, death of peers. This side
// only translates: tensors to buffers, ops to handles, statuses to exceptions. Three rules shape it:
//
//   1. The memory of an operation stays alive until the core calls `done`, whatever the caller drops.
//      The core holds one reference to the Work per submitted operation for that reason.
//   2. `done` runs on threads that do not hold the GIL and must not wait for one that needs it: no
//      lock of ours is held while a Future is completed, and the GIL is released around every call
//      that joins the progress thread.
//   3. The core is destroyed exactly once, by whoever lets go of it last, and never from within
//      `done`.
//
// One translation unit of headers that each hold one thing, because reading torch's headers takes
// longer than compiling all of them.
//
//   kinds.h      operations and their names        shared.h    counters, time limits, hooks of a group
//   errors.h     statuses to exceptions            work.h      what torch waits for
//   buffers.h    tensors to buffers                sparse.h    all-reduce of sparse tensors
//   bootstrap.h  meeting through torch's store     monitored_barrier.h
//   comm.h       who owns the core's group         backend.h   the c10d::Backend
#include <Python.h>

#include <pybind11/chrono.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "backend.h"

namespace py = pybind11;
using firefly::FireflyBackend;
using std::chrono::milliseconds;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native part of firefly's torch backend.";
  if (ffr_abi_version() != FFR_ABI_VERSION)
    throw std::runtime_error(
        "libffreduce.so has ABI version " + std::to_string(ffr_abi_version()) + ", this build wants " +
        std::to_string(FFR_ABI_VERSION) + ": install firefly again");
  py::module_::import("torch._C._distributed_c10d");
  m.def("version", [] { return std::string(ffr_version()); }, "Version of libffreduce.");
  m.def("shutdown_all", &firefly::Live::shutdown, py::call_guard<py::gil_scoped_release>(), "Shuts every group down.");
  py::class_<FireflyBackend, c10::intrusive_ptr<FireflyBackend>, c10d::Backend>(m, "FireflyBackend")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, milliseconds, std::string, const std::string&>(),
           py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("timeout"), py::arg("name") = "ffreduce",
           py::arg("group_name") = "default", py::call_guard<py::gil_scoped_release>())
      .def("_split", &FireflyBackend::splitOff, py::arg("ranks"), py::arg("timeout"), py::arg("name"),
           py::arg("group_name"), py::call_guard<py::gil_scoped_release>(),
           "A group of some ranks of this one; collective over this one.")
      // As torch calls it when a rank takes no part in a group that is split from this one.
      .def("perform_nocolor_split", [](FireflyBackend& self, py::object) { py::gil_scoped_release noGil; self.splitNothing(); },
           py::arg("device"))
      .def("stats", &FireflyBackend::stats, "Counters of this group as a dict.");
}
