/*
 * redirect.c: transfer redirection, decided per packet when the NIC copies.
 *
 * The protocol between the app, which posts and cancels, and the NIC, which claims, stands in
 * vmmc_layout.h.  Sockets and exports use the same one; a socket counts stream positions, an export
 * offsets in its buffer.
 */
#include "nic.h"

struct redirection redirection_of_slot(struct endpoint *e, uint32_t slot) {
  struct vmmc_app_slot *a = app_slot(e, slot);
  struct vmmc_nic_slot *n = nic_slot(e, slot);
  return (struct redirection){ e, &a->post, &a->redirect_offset, &a->redirect_length, &a->redirect_position,
                               &a->redirect_space, &n->claim, &n->redirected_post, &n->redirected_from,
                               &n->redirected_to, 0 };
}

struct redirection redirection_of_export(struct endpoint *e, uint32_t id) {
  struct vmmc_app_export *a = (struct vmmc_app_export *)(e->app + VMMC_APP_EXPORTS) + id;
  struct vmmc_nic_export *n = (struct vmmc_nic_export *)(e->nic + VMMC_NIC_EXPORTS) + id;
  return (struct redirection){ e, &a->post, &a->redirect_offset, &a->redirect_length, &a->redirect_position,
                               NULL, &n->claim, &n->redirected_post, &n->redirected_from, &n->redirected_to, 0 };
}

uint64_t redirect_run(struct redirection *r, uint64_t at, uint64_t length, struct place *to) {
  *to = (struct place){ 0 };
  /* acquire: pairs with the release that published offset, length and position */
  uint64_t post = atomic_load_explicit(r->post, memory_order_acquire);
  if (!post || r->endpoint->dying) return length;
  /* The app may change these while we look: each is read once, and checked as read. */
  uint64_t offset = *(const volatile uint64_t *)r->offset;
  uint64_t room = *(const volatile uint64_t *)r->length;
  uint64_t position = *(const volatile uint64_t *)r->position;
  bool program = r->space && *(const volatile uint64_t *)r->space == VMMC_SPACE_PROGRAM;
  /* Any address will do in the program's memory: the kernel checks it, and nobody else's is behind it. */
  uint64_t end = program ? INT64_MAX : VMMC_HEAP_BYTES;
  if (room > end || offset > end - room || position > UINT64_MAX - room) return length;
  if (at < position) return position - at < length ? position - at : length;
  if (at - position >= room) return length;

  uint64_t told = atomic_load_explicit(r->told, memory_order_relaxed);
  bool first = told != post;
  /* One ascending run: what does not continue it goes to the default place. */
  if (!first && atomic_load_explicit(r->to, memory_order_relaxed) != at) return length;
  if (room - (at - position) < length) length = room - (at - position);
  if (program ? r->endpoint->memory < 0 : utlb_translate(r->endpoint, offset + (at - position), length)) return length;

  if (r->claimed != post) {
    /* Claim, then look again: with the app's "post = 0, then look at claim", both seq_cst, one of the
     * two sees the other's store. */
    atomic_store(r->claim, post);
    r->claimed = post;
    if (atomic_load(r->post) != post) {
      redirect_done(r);
      return length;
    }
  }
  if (first) {
    /* The generation last: a reader that finds it finds its bounds. */
    atomic_store_explicit(r->from, at, memory_order_relaxed);
    atomic_store_explicit(r->to, at, memory_order_relaxed);
    atomic_store_explicit(r->told, post, memory_order_release);
  }
  to->program = program;
  to->at = (program ? (char *)0 : r->endpoint->app + VMMC_APP_HEAP) + offset + (at - position);
  return length;
}

uint64_t redirect_covers(const struct redirection *r, uint64_t at, uint64_t length) {
  /* acquire: pairs with the release that published length and position */
  if (!atomic_load_explicit(r->post, memory_order_acquire)) return 0;
  uint64_t room = *(const volatile uint64_t *)r->length, position = *(const volatile uint64_t *)r->position;
  if (room > VMMC_HEAP_BYTES || position > UINT64_MAX - room) return 0;
  uint64_t first = at > position ? at : position, end = at + length < position + room ? at + length : position + room;
  return end > first ? end - first : 0;
}

void redirect_copied(struct redirection *r, uint64_t upto) {
  atomic_store_explicit(r->to, upto, memory_order_release);
}

void redirect_done(struct redirection *r) {
  if (!r->claimed) return;
  r->claimed = 0;
  /* release: whoever sees the claim gone sees the bytes and the bounds */
  atomic_store_explicit(r->claim, 0, memory_order_release);
}

void redirect_recover(struct redirection *r, uint64_t placed) {
  if (atomic_load_explicit(r->to, memory_order_relaxed) > placed)
    atomic_store_explicit(r->to, placed, memory_order_relaxed);
  atomic_store_explicit(r->claim, 0, memory_order_release);
}
