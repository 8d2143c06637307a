// Ctrl-C and other signals while a call waits. A call runs without the GIL, and Python runs the handlers of signals
// only in its main thread and between two of its own instructions: without this, not before the wait has ended.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace abiding::peer {

// Functions of the running Python, by the names of its C API. The loader hands them over, since the binaries work under
// every Python and link none.
struct Python {
  int (*PyGILState_Ensure)();
  void (*PyGILState_Release)(int state);
  int (*PyErr_CheckSignals)();
  void (*PyErr_Fetch)(void** type, void** value, void** traceback);
  void (*PyErr_Restore)(void* type, void* value, void* traceback);
  int (*Py_AddPendingCall)(int (*function)(void*), void* argument);
};
inline std::atomic<const Python*> python{nullptr};

// What a signal's handler has raised. Only the main thread touches it.
inline void* raised[3] = {};

// Whether a signal's handler has raised, so that the wait is to end. Python raises the exception again as soon as the
// call has returned to it: no error that this library throws could carry it.
inline bool poll_interrupt() {
  static thread_local unsigned polls = 0;  // the GIL is asked for about ten times a second
  if (++polls % 10 != 0) return false;
  const Python* py = python.load(std::memory_order_acquire);
  if (!py || syscall(SYS_gettid) != getpid()) return false;
  const int state = py->PyGILState_Ensure();
  const bool interrupted = py->PyErr_CheckSignals() != 0;
  if (interrupted) {
    py->PyErr_Fetch(&raised[0], &raised[1], &raised[2]);
    py->Py_AddPendingCall(
        [](void*) {
          python.load()->PyErr_Restore(raised[0], raised[1], raised[2]);
          return -1;
        },
        nullptr);
  }
  py->PyGILState_Release(state);
  return interrupted;
}

}  // namespace abiding::peer
