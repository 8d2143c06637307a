// The tables of the CPU binary: communicators, buffers and mappings. A fork copies them to a process that is no rank.
#pragma once

#include <cstdint>
#include <mutex>

namespace abiding::peer {

// Guards all tables. fork() takes it, so that a child never inherits it locked by a thread that it does not have.
std::mutex& tables_mutex();

// How many forks lie between this process and the one that loaded the binary. What was made at another count belongs to
// a process that this one was forked from. The C library counts, since asking for the process id is a system call.
uint32_t forks();

}  // namespace abiding::peer
