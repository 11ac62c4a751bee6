// Statuses of the core as exceptions of torch.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

#include "ffreduce.h"

namespace firefly {

inline std::string lastError() {
  std::string text(ffr_last_error(nullptr, 0) + 1, '\0');
  text.resize(ffr_last_error(text.data(), text.size()));
  return text;
}

inline std::exception_ptr asException(ffr_status status, const std::string& message) {
  const c10::SourceLocation here{__func__, __FILE__, static_cast<uint32_t>(__LINE__)};
  switch (status) {
    case FFR_ERR_INVALID:
      return std::make_exception_ptr(c10::ValueError(here, message));
    case FFR_ERR_UNSUPPORTED:
      return std::make_exception_ptr(c10::NotImplementedError(here, message));
    case FFR_ERR_TIMEOUT:
      return std::make_exception_ptr(c10::DistBackendError(
          here, message + "; if they are only slow, raise the timeout of init_process_group or new_group"));
    default:
      return std::make_exception_ptr(c10::DistBackendError(here, message));
  }
}

// The last error of a call that has just returned `status`.
[[noreturn]] inline void throwLast(ffr_status status) {
  std::rethrow_exception(asException(status, lastError()));
}

// What went wrong, without a stack: for our own messages.
inline std::string firstLine(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

} // namespace firefly
