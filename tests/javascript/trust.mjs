// What a device believes: statements signed by a key that it pinned. Bytes in; a value or a refusal out.

import { verify } from 'node:crypto';

import { malformed, refuseUnless } from './errors.mjs';
import { ed25519PublicKey, keyId } from './identity.mjs';
import { checkDigest, checkName, decode } from './wire.mjs';

const RELEASE = Buffer.from('umbel-release/1\0');

export const isSigned = (publicKey, signature, ...statement) => (
  signature.length === 64 && verify(null, Buffer.concat(statement), ed25519PublicKey(publicKey), signature)
);

// What a signed release states. The bytes that were signed are the bytes that are read.
export function verifyRelease(signed, releaseKey) {
  refuseUnless(signed.release.length && signed.signature.length, 'malformed-message', 'a release without a signature');
  const good = signed.key_id === keyId(releaseKey) && isSigned(releaseKey, signed.signature, RELEASE, signed.release);
  refuseUnless(good, 'signature-invalid', 'the release is not signed by the key that was pinned at enrolment');
  const release = decode('Release', signed.release);
  checkName(release.model, "the release's model");
  checkName(release.channel, "the release's channel");
  checkDigest(release.bundle_digest, "the release's bundle");
  if (!(release.number >= 1)) throw malformed('a release without a number');
  return release;
}
