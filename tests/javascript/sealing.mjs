// Sealing for one reader: HPKE (RFC 9180) in base mode, and what a report of a public round is bound to.

import { Aes256Gcm, CipherSuite, DhkemX25519HkdfSha256, HkdfSha256 } from '@hpke/core';

import { keyId } from './identity.mjs';
import { Refused } from './errors.mjs';

export const SEALED = 'umbel-sealed/1';

const hpke = new CipherSuite({ kem: new DhkemX25519HkdfSha256(), kdf: new HkdfSha256(), aead: new Aes256Gcm() });

// The encapsulated key (32 bytes), then the ciphertext. A key of small order is refused by the exchange itself.
export async function seal(publicKey, info, cleartext) {
  try {
    const recipientPublicKey = await hpke.kem.deserializePublicKey(publicKey);
    const sender = await hpke.createSenderContext({ recipientPublicKey, info });
    return Buffer.concat([Buffer.from(sender.enc), Buffer.from(await sender.seal(cleartext))]);
  } catch (error) {
    throw new Refused('seal-broken', `nothing can be sealed to this key: ${error.message}`);
  }
}

// `info` of a public round: each part as text after its length, 32 bits, little-endian.
export function bindingOf(publicKey, { task, round, session_id, report_id, base }) {
  const parts = [SEALED, keyId(publicKey), task, String(round), session_id, report_id, base];
  return Buffer.concat(parts.flatMap((part) => {
    const text = Buffer.from(part);
    const length = Buffer.alloc(4);
    length.writeUInt32LE(text.length);
    return [length, text];
  }));
}
