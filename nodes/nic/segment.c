/* segment.c: mapping shared memory by name. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "nic.h"

static void segment_name(char *name, size_t size, uint32_t node, const char *what) {
  snprintf(name, size, "/vmmc.%u.%s.node%u.%s", nic.uid, nic.cluster, node, what);
}

/* NORESERVE: segments are sparse, what is used of them is committed before it is promised. */
static void *map(int fd, uint64_t bytes, bool writable) {
  void *base = mmap(NULL, bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
  return base == MAP_FAILED ? NULL : base;
}

void *segment_map(uint32_t node, const char *what, uint64_t bytes, bool writable, int *fd_out) {
  char name[128];
  segment_name(name, sizeof name, node, what);
  int fd = shm_open(name, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC, 0);
  if (fd < 0) return NULL;
  struct stat s;
  void *base = NULL;
  if (fstat(fd, &s) == 0 && (uint64_t)s.st_size < bytes)
    errno = EPROTO;
  else
    base = map(fd, bytes, writable);
  if (base && fd_out) {
    *fd_out = fd;
  } else {
    int error = errno;
    close(fd);
    errno = error;
  }
  return base;
}

void *segment_make(uint32_t node, const char *what, uint64_t bytes) {
  char name[128];
  segment_name(name, sizeof name, node, what);
  int fd = shm_open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return NULL;
  struct stat s;
  bool ours = fstat(fd, &s) == 0 && s.st_size == 0; /* made here, not by the other side of the link */
  /* Committed at once: a link that is promised must not meet a full /dev/shm at a random store. */
  int error;
  do error = posix_fallocate(fd, 0, (off_t)bytes);
  while (error == EINTR);
  void *base = error ? NULL : map(fd, bytes, true);
  if (!base) {
    if (!error) error = errno;
    if (ours) shm_unlink(name);
  }
  close(fd);
  errno = error;
  return base;
}

void segment_end(uint32_t node, const char *what) {
  char name[128];
  segment_name(name, sizeof name, node, what);
  shm_unlink(name);
}

bool segment_commit(int fd, uint64_t offset, uint64_t length) {
  int error;
  do error = posix_fallocate(fd, (off_t)offset, (off_t)length);
  while (error == EINTR);
  if (error) log_event("error", "no room for %llu bytes of shared memory: %s", (unsigned long long)length, strerror(error));
  return !error;
}
