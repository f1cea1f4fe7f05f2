// One error for everything that is refused, here or by a peer, and what a device does about it.
//
// The table of docs/reference/device-protocol.md, "Errors": a code, or else the gRPC status, tells when to come back.

export class Refused extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

export const malformed = (message) => new Refused('malformed-message', message);
export const outOfBounds = (message) => new Refused('out-of-bounds', message);

export function refuseUnless(condition, code, message) {
  if (!condition) throw new Refused(code, message);
}

// gRPC's numbers of the statuses that the table names, with a code of the same meaning.
const BY_STATUS = new Map([
  [1, 'unreachable'], [3, 'bad-input'], [4, 'unreachable'], [5, 'not-found'], [6, 'already-exists'], [7, 'not-allowed'],
  [8, 'unavailable'], [9, 'conflict'], [10, 'round-closed'], [11, 'bad-input'], [12, 'bad-input'], [14, 'unreachable'],
  [15, 'digest-mismatch'], [16, 'not-authentic'],
]);

const FOR_GOOD = new Set([
  'malformed-message', 'input-mismatch', 'weights-mismatch', 'not-finite', 'out-of-bounds', 'bundle-invalid', 'bad-input',
  'seal-broken', 'certificate-refused', 'enrolment-refused', 'signature-invalid', 'expired', 'rollback-refused',
  'not-authentic', 'not-allowed', 'not-found',
]);
const OF_THE_ROUND = new Set([
  'round-closed', 'already-exists', 'already-reported', 'wrong-state', 'conflict', 'cohort-too-small', 'set-refused',
  'budget-spent',
]);
const NOBODY_THERE = new Set(['unavailable', 'unreachable', 'interrupted']);
const PASSING = new Set([...NOBODY_THERE, 'digest-mismatch', 'internal']);

// An error of a gRPC call as one of ours. A code that nobody knows here goes by its status.
export function fromGrpc(error) {
  const told = String(error.metadata?.get('umbel-error')[0] ?? '');
  const isKnown = FOR_GOOD.has(told) || OF_THE_ROUND.has(told) || PASSING.has(told);
  return new Refused(isKnown ? told : BY_STATUS.get(error.code) ?? 'internal', error.details || error.message);
}

// Whether trying again soon may help; the same again to what else is refused would be refused again.
export const mayPass = ({ code }) => PASSING.has(code);

// Whether the round, and not this device, is why a report isn't wanted.
export const isOfTheRound = ({ code }) => OF_THE_ROUND.has(code);

// Whether a session that met this error stays open: nobody was there, or the device was needed.
export const goesOn = ({ code }) => NOBODY_THERE.has(code);
