// The processes of other ranks.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace abiding::peer {

// Whether a process has ended. False where it cannot be looked up, for want of a descriptor say: only "no such process"
// and a zombie, a process that has ended and that its parent has not waited for yet, have ended.
inline bool has_ended(uint32_t pid) {
  if (pid == 0) return false;
  if (kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH) return true;
  char path[32], text[512];
  std::snprintf(path, sizeof path, "/proc/%u/stat", pid);
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  const ssize_t size = read(file, text, sizeof text - 1);
  const bool ended_meanwhile = size < 0 && errno == ESRCH;
  close(file);
  if (size <= 0) return ended_meanwhile;
  text[size] = 0;
  const char* name_end = std::strrchr(text, ')');  // the last one: the name may hold any character
  return name_end && name_end[1] && (name_end[2] == 'Z' || name_end[2] == 'X');
}

}  // namespace abiding::peer
