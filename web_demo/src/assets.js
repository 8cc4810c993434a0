/** Paths and versions that the build fixes; `__ASSETS__` is replaced by build.mjs. */
/* global __ASSETS__ */
export const ASSETS = __ASSETS__;
