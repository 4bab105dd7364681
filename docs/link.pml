/*
 * link.pml: the protocol of nodes/nic/retransmit.c and wire.c, as a model for spin.
 *
 *     spin -a docs/link.pml
 *     cc -O2 -DSAFETY -DNOCLAIM -o pan pan.c && ./pan -m1000000          (assertions, deadlocks)
 *     cc -O2 -o pan pan.c && ./pan -a -f -m1000000                       (everything arrives)
 *
 * One direction: a sender with a bounded window, whose packets stay in their place until they are acknowledged,
 * and a receiver that handles packets in order and keeps of early ones a bit each.  First transmissions need no
 * message: a packet that is published has been transmitted, and what the wire does to it is decided when the
 * receiver's NIC takes it in (`seen`).  Retransmissions and acknowledgements are messages.  The wire, either way,
 * may lose a message, deliver it twice, and deliver any of those under way next.  It cannot lose for ever: a
 * number of losses and of duplicates is drawn on.
 *
 * What is checked: each packet is handled once and in order (assertions), a place is used again only when
 * nobody will read it as what it was (assertions), in the end all of them were handled and the sender knows
 * (ltl whole), and there is no state in which nothing can happen before that (invalid end states).
 *
 * Sequence numbers are not modelled with their wrap-around: 64 bits do not come round.  A receiver whose NIC is
 * killed forgets what was early and under way (FORGETS says how often); the sender's successor forgets what it
 * has heard of, and only knows what it noted as acknowledged.
 */
#ifndef PACKETS
#define PACKETS 3 /* to be sent in all */
#endif
#ifndef WINDOW
#define WINDOW 2 /* places in the sender's queue */
#endif
#ifndef LOSSES
#define LOSSES 2
#endif
#ifndef DUPLICATES
#define DUPLICATES 1
#endif
#ifndef FORGETS
#define FORGETS 1
#endif
#ifndef GUESSES
#define GUESSES 2 /* retransmissions before the timer's time */
#endif
#define FLIGHTS 2 /* messages under way at a time, each way; a further one is lost */

/* Shared memory.  Who writes it: */
byte place[WINDOW]; /* sender: the packet that lies in each place of its queue */
byte tail;          /* sender: packets published */
byte taken;         /* receiver: packets handled, in order */
byte noted;         /* sender: acknowledged, for a successor */

/* Private to a NIC, and forgotten with it. */
byte acknowledged;     /* sender */
bool heard[PACKETS];   /* sender: there, early */
byte seen;             /* receiver: packets that entered the wire for the first time */
bool early[WINDOW];    /* receiver: that packet of the window is there */
bool arrived[PACKETS]; /* what is so, for assertions */
bool owes;             /* receiver: an acknowledgement */

chan there = [FLIGHTS] of { byte };       /* transmissions under way: which packet */
chan back = [FLIGHTS] of { byte, short }; /* acknowledgements: how far, and a bit for each that is early */

byte losses = LOSSES, duplicates = DUPLICATES, forgets = FORGETS, guesses = GUESSES;

inline transmit(n) { /* the packet enters the wire */
  if
  :: nfull(there) -> there!n
  :: nfull(there) && duplicates > 0 -> duplicates--; there!n; if :: nfull(there) -> there!n :: full(there) fi
  :: losses > 0 -> losses--
  fi
}

active proctype sender() {
  byte n, upto;
  short bits;
  do
  :: atomic { /* a new packet */
       tail < PACKETS && tail - acknowledged < WINDOW ->
       assert(taken + WINDOW > tail); /* who lay there was handled */
       place[tail % WINDOW] = tail;
       tail++
     }
  :: atomic { /* evidence of a loss, or what is mistaken for one: any packet not known to be there, at any time */
       guesses > 0 && acknowledged < tail ->
       guesses--;
       select(n : acknowledged .. tail - 1);
       if
       :: heard[n]
       :: !heard[n] && full(there)
       :: !heard[n] && nfull(there) -> transmit(n)
       fi;
       n = 0
     }
  :: atomic { /* the timer, once nothing is under way any more: the oldest, whatever was heard of it */
       acknowledged < tail && seen == tail && empty(there) && empty(back) && !owes ->
       n = acknowledged;
       do :: n < tail -> heard[n] = false; n++ :: else -> break od;
       n = acknowledged;
       transmit(n);
       n = 0
     }
  :: atomic { /* any acknowledgement under way arrives */
       if
       :: back?upto, bits
       :: len(back) > 1 -> back?upto, bits; back!upto, bits; back?upto, bits
       fi;
       assert(upto <= taken); /* nobody says more than is so */
       if
       :: upto > acknowledged -> acknowledged = upto; noted = upto
       :: else
       fi;
       n = acknowledged;
       do
       :: n < tail -> if :: (bits >> n) & 1 -> heard[n] = true :: else fi; n++
       :: else -> break
       od;
       upto = 0; bits = 0; n = 0
     }
  :: atomic { losses > 0 && nempty(back) -> losses--; back?upto, bits; upto = 0; bits = 0 }
  :: atomic { /* killed: its successor */
       forgets > 0 -> forgets--;
       acknowledged = noted;
       n = 0;
       do :: n < PACKETS -> heard[n] = false; n++ :: else -> break od;
       n = 0
     }
  :: atomic { acknowledged == PACKETS -> break }
  od
}

active proctype receiver() {
  byte n;
  short bits;
end:
  do
  :: atomic { /* a packet is seen to be published: its first transmission */
       seen < tail && nfull(there) ->
       transmit(seen);
       seen++
     }
  :: atomic { /* any transmission under way arrives */
       if
       :: there?n
       :: len(there) > 1 -> there?n; there!n; there?n
       fi;
       owes = true;
       if
       :: n < taken || early[n % WINDOW] /* there already */
       :: else ->
          assert(n < taken + WINDOW && n < tail);
          early[n % WINDOW] = true;
          arrived[n] = true
       fi;
       do /* handles what is there, in order */
       :: early[taken % WINDOW] ->
          assert(arrived[taken]);
          assert(place[taken % WINDOW] == taken); /* it still lies where it was put: the right one, and once */
          early[taken % WINDOW] = false;
          taken++
       :: else -> break
       od;
       n = 0
     }
  :: atomic { losses > 0 && nempty(there) -> losses--; there?n; n = 0 }
  :: atomic { /* acknowledges */
       owes && nfull(back) ->
       bits = 0; n = 0;
       do
       :: n < PACKETS -> if :: n >= taken && n < taken + WINDOW && early[n % WINDOW] -> bits = bits | (1 << n) :: else fi; n++
       :: else -> break
       od;
       back!taken, bits;
       owes = false;
       n = 0; bits = 0
     }
  :: atomic { /* killed: its successor takes everything that is published for new, and is asked again */
       forgets > 0 -> forgets--;
       n = 0;
       do :: n < WINDOW -> early[n] = false; n++ :: else -> break od;
       n = 0;
       do :: nempty(there) -> there?n :: empty(there) -> break od;
       n = 0;
       seen = taken;
       owes = true
     }
  od
}

/* Fairly scheduled, everything is handled and known to be (weak fairness: pan -a -f). */
ltl whole { <> (taken == PACKETS && acknowledged == PACKETS) }
