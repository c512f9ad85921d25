/* An empty library with torch's name (libtorch_cpu.so). Linking against it records the dependency, which at load time
   resolves to the torch that the process has already loaded; so a build needs no torch. */
