/*
 * vmmc_copy.h: memcpy of many bytes, at its usual speed wherever they lie.
 *
 * memcpy of glibc copies larger blocks by `rep movsb`, which on some processors (an AMD EPYC, say) is fifteen
 * times slower when the destination lies a few bytes further into its page than the source into its own: the
 * processor takes what it is about to load for what it has just stored.  malloc gives large blocks 16 bytes into a
 * page, and ring buffers begin with one, so that is what most receives are.  Smaller pieces are copied by loads and
 * stores, which do not mind.  Figures: docs/performance.md.
 */
#ifndef VMMC_COPY_H
#define VMMC_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Addresses as a program gave them: NULL is one that faults, though memcpy is declared never to get it. */
__attribute__((noinline, no_sanitize("nonnull-attribute"))) static void vmmc_copy(void *to, const void *from, size_t length) {
  enum { PAGE = 4096, CLOSE = 128, PIECE = 2048 }; /* bytes; PIECE is not more than glibc copies by loads and stores */
  char *t = to;
  const char *f = from;
  uintptr_t ahead = ((uintptr_t)t - (uintptr_t)f) % PAGE;
  if (ahead && ahead < CLOSE)
    for (; length > PIECE; t += PIECE, f += PIECE, length -= PIECE) memcpy(t, f, PIECE);
  memcpy(t, f, length);
}

#endif
